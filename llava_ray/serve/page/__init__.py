"""The page: a Gradio chat about images, which is a client of the gateway like any other.

app.py            mounts it on the gateway's application, or as an application of its own
layout.py         the components              style.py     the CSS
wiring.py         events -> handlers          handlers.py  the functions behind the controls
conversation.py   chat messages <-> requests and answers
compare.py        two answers at once         image_modes.py  resizing before upload
feedback.py       the log of votes            download.py  a conversation as a zip file
moderation.py     checks questions            upload_guard.py  what browsers may send to Gradio
store.py          the folder of uploads
"""

from llava_ray.serve.page.app import Page, build_app, mount_page

__all__ = ["Page", "build_app", "mount_page"]
