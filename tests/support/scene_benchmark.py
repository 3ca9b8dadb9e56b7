"""Questions about scenes that the embedded model knows, as one's own benchmark."""

from pathlib import Path

from llava_ray.demo import scenes
from llava_ray.demo.evaluate import LATER_TURNS, make_cases
from tests.support.benchmark_files import write_lines


def write_scenes(folder: Path, *, num_scenes: int) -> Path:
    """Write questions.jsonl (about ten questions a scene) and its images; return the folder."""
    rows = []
    for number, case in enumerate(make_cases(num_scenes)):
        if case.kind in (LATER_TURNS, "description"):
            continue
        name = f"{number}.png"
        folder.mkdir(parents=True, exist_ok=True)
        scenes.draw(case.scene).save(folder / name)
        row = {"question_id": str(number), "image": name, "text": case.question}
        rows.append({**row, "answer": case.answer, "category": case.kind})
    write_lines(folder / "questions.jsonl", rows)
    return folder
