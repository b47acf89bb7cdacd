"""ExecuTorch's own language-model runners in a process of their own; a script without anything of Triptych.

Arguments: "text" or "multimodal", the ``.pte``, the tokenizer, a JSON file with requests, the file for the results,
and a mark. The runners print what they generate, so results go to a file, one JSON object a line; the mark on standard
error stands before what the runner logs about each request.
"""

import json
import sys
from pathlib import Path
from typing import Any

# The operators that Triptych's programs call register themselves on import; in an app they are linked in.
import executorch.extension.llm.custom_ops.custom_ops
import executorch.kernels.quantized  # noqa: F401
import torch
from executorch.extension.llm import runner as llm

MAKERS = {
    "text": llm.make_text_input,
    "tokens": llm.make_token_input,
    "image": lambda path: llm.make_image_input(torch.load(path, weights_only=True)),
}


def answer(runner: Any, kind: str, request: dict[str, Any]) -> dict[str, Any]:
    """Carry out one request from an empty cache."""
    runner.reset()
    pieces: list[str] = []
    stats: list[Any] = []
    config = llm.GenerationConfig(
        max_new_tokens=request["max_new_tokens"], temperature=0.0, echo=False, num_bos=0, num_eos=0
    )
    if kind == "text":
        ((_, inputs),) = request["inputs"]
    else:
        inputs = [MAKERS[word](value) for word, value in request["inputs"]]
    try:
        runner.generate(inputs, config, pieces.append, stats.append)
    except RuntimeError as error:
        return {"error": str(error), "pieces": pieces, "prompt_tokens": 0}
    return {"error": None, "pieces": pieces, "prompt_tokens": stats[0].num_prompt_tokens}


def main() -> None:
    """Run all requests on one runner."""
    kind, program, tokenizer, requests, results, mark = sys.argv[1:]
    maker = llm.TextLLMRunner if kind == "text" else llm.MultimodalRunner
    with Path(results).open("w", encoding="utf-8") as stream:
        try:
            runner = maker(program, tokenizer)
        except RuntimeError as error:
            sys.exit(f"RuntimeError: {error}")
        for request in json.loads(Path(requests).read_text(encoding="utf-8")):
            sys.stderr.write(f"{mark}\n")
            sys.stderr.flush()
            stream.write(json.dumps(answer(runner, kind, request)) + "\n")
            stream.flush()


if __name__ == "__main__":
    main()
