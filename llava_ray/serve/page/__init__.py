"""The page: a chat about images, in Gradio, and a client of the gateway like any other.

app.py           mounts it: on the gateway's own application, or as one of its own
layout.py        what stands where          style.py     how it looks
wiring.py        which control does what    handlers.py  the functions behind the controls
conversation.py  what is asked and answered images.py, download.py, compare.py: its parts
door.py          what a visitor may send to Gradio at all
store.py         where uploads are kept
"""

from llava_ray.serve.page.app import Page, build_app, mount_page

__all__ = ["Page", "build_app", "mount_page"]
