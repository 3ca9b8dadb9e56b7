"""Packs conversations into a zip for download: LLaVA's training format and the images."""

import json
import uuid
import zipfile
from io import BytesIO

from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder

from llava_ray.serve.page.conversation import Chat, read_history
from llava_ray.serve.page.feedback import build_record

FILE_NAME = "conversation.zip"


def pack_conversations(chats: list[Chat]) -> str:
    """Write a zip of the chats that are not empty; return its path.

    It contains `conversation.json`, a list of samples, and their images as they were sent to the
    model.
    """
    file = BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        rows = []
        for messages in filter(None, map(read_history, chats)):
            record = build_record(uuid.uuid4().hex, messages)
            rows.append(record.row)
            for name, data in record.images.items():
                if name not in archive.namelist():
                    archive.writestr(name, data)
        archive.writestr("conversation.json", json.dumps(rows, indent=2, ensure_ascii=False))
    return save_bytes_to_cache(file.getvalue(), FILE_NAME, get_upload_folder())
