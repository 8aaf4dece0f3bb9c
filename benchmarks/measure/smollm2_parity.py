"""Real weights through our converter: SmolLM2-135M-Instruct against transformers.

    python -m benchmarks.measure.smollm2_parity

What to install for the weights is said in benchmarks/smollm2.py. Our converter reads the folder that
transformers writes; compared are the logits of twenty prompts and 32 greedy tokens of each, alone and in one batch.
Exits 0 with a reason if a package is absent, 1 if the logits differ by more than 1e-3 of their scale or a token
differs."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from benchmarks import smollm2
from benchmarks.program import RESULTS, argument_parser, cores, origin, write_result

PROMPTS = (
    "The capital of France is",
    "What is the boiling point of water at sea level?",
    "Write a haiku about autumn leaves.",
    "def fibonacci(n):",
    "Explain in one sentence why the sky is blue.",
    "Once upon a time",
    "The three primary colours are",
    "To bake bread you need",
    "In 1969, two people",
    "A list of European capitals:\n1.",
    "Water is made of",
    "My favourite book is",
    "The quick brown fox",
    "SELECT name FROM users WHERE",
    "Dear Sir or Madam,",
    "The difference between a lake and a sea is",
    "import numpy as np\n\n",
    "Two plus two is",
    "She opened the door and",
    "The largest planet of the solar system",
)
NEW_TOKENS = 32
NEVER = -1  # no token ends an answer: all 32 are compared


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__spec__.name, __doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "smollm2_parity.json")
    return parser.parse_args(arguments)


def main() -> int:
    out = parse().out
    if missing := smollm2.absent():
        print(f"skipped: {', '.join(missing)} not installed; see the head of benchmarks/smollm2.py")
        return 0
    import jax
    import numpy as np
    import torch

    from deltallava_jax import load
    from deltallava_jax.inference.generate import prompt_batch
    from deltallava_jax.inference.model import plain_prompt
    from deltallava_jax.inference.sampling import Sampling
    from deltallava_jax.models import vlm

    jax.config.update("jax_default_matmul_precision", "highest")
    with tempfile.TemporaryDirectory() as folder:
        theirs = smollm2.write(folder)
        ours = load(folder)
    sampling = Sampling(max_new_tokens=NEW_TOKENS)
    prompts = [plain_prompt(prompt, ours.tokenizer) for prompt in PROMPTS]
    length = max(len(one.ids) for one in prompts)
    together = ours.engine.tokens(prompt_batch(prompts, length), sampling=sampling, end=NEVER)
    rows = []
    for prompt, tokenized, in_batch in zip(PROMPTS, prompts, together, strict=True):
        batch = prompt_batch([tokenized], len(tokenized.ids))
        logits = np.asarray(vlm.logits(ours.params, ours.cfg, batch))[0]
        ids = torch.tensor(tokenized.ids[None].astype(np.int64))
        with torch.no_grad():
            expected = theirs(ids).logits[0].numpy()
            answer = theirs.generate(
                ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=NEVER
            )
            answer = answer[0, ids.shape[1] :]
        (tokens,) = ours.engine.tokens(batch, sampling=sampling, end=NEVER)
        rows.append(
            {
                "prompt": prompt,
                "max_abs_error": float(np.abs(logits - expected).max()),
                "max_abs_logit": float(np.abs(expected).max()),
                "same_tokens": int((np.array(tokens) == answer.numpy()).sum()),
                "same_tokens_in_a_batch": int((np.array(in_batch) == answer.numpy()).sum()),
                "tokens": NEW_TOKENS,
                "text": ours.tokenizer.decode(tokens),
            }
        )
        print(json.dumps(rows[-1]))
    same = ("same_tokens", "same_tokens_in_a_batch")
    good = all(
        r["max_abs_error"] < 1e-3 * r["max_abs_logit"] and all(r[key] == r["tokens"] for key in same) for r in rows
    )
    result = {
        **origin(__spec__.name, [], cores(), ("jax", "torch", "transformers")),
        "weights": smollm2.gguf().name,
        "equal": good,
        "prompts": rows,
    }
    write_result(out, result)
    print(f"{'equal' if good else 'DIFFERENT'}; written to {out}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
