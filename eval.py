"""Evaluates a workdir, see deltallava_jax/apps/eval.py: python eval.py --workdir runs/easy_vqa"""

import sys

from deltallava_jax.apps.eval import main, parse, run

__all__ = ["main", "parse", "run"]

if __name__ == "__main__":
    run(sys.argv[1:])
