"""Asks vLLM or SGLang about a model folder; a program for the Python of their environments.

    python read_with_engine.py vllm|sglang FOLDER QUESTIONS ANSWERS [TOKENIZER]

QUESTIONS is a JSON file: a list of {"prompt": text with one <image> an image, "images": [file]}.
ANSWERS is written: a list of {"prompt_length", "ids"} of greedy decoding. With TOKENIZER, a folder,
SGLang uses its own LLaVA class, which reads LLaVA's format, in place of transformers' class. It
imports only the engine and its dependencies, because this package is not in that environment.
"""

import json
import os
import sys
from pathlib import Path

NUM_NEW_TOKENS = 16
MAX_LENGTH = 512
MAX_IMAGES = 4


def ask_vllm(folder: str, questions: list[dict]) -> list[dict]:
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=folder,
        dtype="float32",
        max_model_len=MAX_LENGTH,
        max_num_seqs=4,
        enforce_eager=True,  # compiling takes longer than all answers
        limit_mm_per_prompt={"image": MAX_IMAGES},
    )
    prompts = [
        {"prompt": question["prompt"], "multi_modal_data": {"image": read_images(question)}}
        if question["images"]
        else {"prompt": question["prompt"]}
        for question in questions
    ]
    greedy = SamplingParams(temperature=0, max_tokens=NUM_NEW_TOKENS)
    return [
        {"prompt_length": len(out.prompt_token_ids), "ids": list(out.outputs[0].token_ids)}
        for out in engine.generate(prompts, greedy, use_tqdm=False)
    ]


def ask_sglang(folder: str, questions: list[dict], tokenizer: str | None) -> list[dict]:
    import torch

    settings = {"model_impl": "transformers", "dtype": "float32"}
    if tokenizer:  # its own class has its towers in float16
        settings = {"model_impl": "sglang", "dtype": "float16", "tokenizer_path": tokenizer}
    if not torch.cuda.is_available():
        settings["device"] = "cpu"
        os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    import sglang

    engine = sglang.Engine(
        model_path=folder,
        attention_backend="torch_native",
        max_total_tokens=8 * MAX_LENGTH,
        disable_cuda_graph=True,
        skip_server_warmup=True,
        log_level="warning",
        **settings,
    )
    try:
        answers = engine.generate(  # as one batch, in which it counts a question's images itself
            prompt=[question["prompt"] for question in questions],
            image_data=[read_images(question) or None for question in questions],
            sampling_params={"temperature": 0, "max_new_tokens": NUM_NEW_TOKENS},
        )
    finally:
        engine.shutdown()
    return [
        {"prompt_length": answer["meta_info"]["prompt_tokens"], "ids": answer["output_ids"]}
        for answer in answers
    ]


def read_images(question: dict) -> list:
    from PIL import Image

    return [Image.open(file).convert("RGB") for file in question["images"]]


def main() -> None:
    engine, folder, file, out, *tokenizer = sys.argv[1:]
    questions = json.loads(Path(file).read_text())
    if engine == "vllm":
        answers = ask_vllm(folder, questions)
    else:
        answers = ask_sglang(folder, questions, tokenizer[0] if tokenizer else None)
    Path(out).write_text(json.dumps(answers))


if __name__ == "__main__":  # the engines start this module again in their own processes
    main()
