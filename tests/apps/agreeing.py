"""One of two processes that tune one run, each with a cache of its own:

    python -m tests.apps.agreeing FOLDER COORDINATOR PROCESSES PROCESS

The first one measures; in the table of the second, a slow kernel is the choice."""

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    import jax

    folder, coordinator, processes, process = sys.argv[1:]
    jax.distributed.initialize(coordinator, int(processes), int(process))

    from deltallava_jax.apps.tune import Program, tune
    from deltallava_jax.config import override
    from deltallava_jax.data import cache
    from deltallava_jax.kernels import registry, tuning
    from deltallava_jax.kernels.tuning import Result
    from deltallava_jax.parallel.mesh import make_mesh
    from deltallava_jax.training.step import TrainStep, batch_shapes
    from tests import tiny
    from tests.apps.test_tune import SLOW, SMALL
    from tests.kernels import planted

    planted.plant(planted.slow, planted.raising)
    cfg = override(tiny.get_config(), SMALL)
    step = TrainStep(cfg, make_mesh(cfg), 10)
    with registry.recording() as recorded:
        step.trace(batch_shapes(cfg, step.mesh, 30, 1), 4)
    if process == "1":
        slow = {str(call): Result("slow", {}) for call in recorded.calls}
        tuning.file(cache.folder()).parent.mkdir(parents=True)
        tuning.file(cache.folder()).write_text(tuning.text({tuning.environment(): slow}))
    lines = []
    tune(step, [Program(30, 1, 4)], lines.append)
    program = str(step.trace(batch_shapes(cfg, step.mesh, 30, 1), 4).jaxpr)
    found = {"choices": registry._measured[1], "lines": lines, "slow": SLOW in program}
    (Path(folder) / f"{process}.json").write_text(json.dumps(found))
