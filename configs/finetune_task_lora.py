"""Adapters on a whole model for a task of one's own: records in LLaVA's JSON format and their images.

The model is that of init_from, a workdir of train.py or convert (``convert llava-1.5-7b-hf runs/llava``), of any system
and size; rates and adapters are LLaVA's (finetune_task_lora.sh). On one GPU add --config.optimizer.accumulation=16."""

from deltallava_jax import config as c


def get_config():
    return c.Config(
        name="task_lora",
        init_from="runs/llava",
        data=c.DataConfig(
            dataset="llava",
            json=("data/task/train.json",),
            images="data/task/images",
            rows=16,
            row_length=2048,
            workers=4,
        ),
        optimizer=c.OptimizerConfig(lr=2e-4, frozen=("^vision/", "^decoder/"), rates={"^projector/": 2e-5}),
        lora=c.LoraConfig(),
        training=c.TrainingConfig(epochs=1, checkpoint_every=200),
        mesh=c.MeshConfig(data=1, fsdp=-1),
    )
