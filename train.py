"""Trains a model, see deltallava_jax/apps/train.py: python train.py --config configs/easy_vqa.py --workdir DIR"""

import sys

from deltallava_jax.apps.train import main, parse, run

__all__ = ["main", "parse", "run"]

if __name__ == "__main__":
    run(sys.argv[1:])
