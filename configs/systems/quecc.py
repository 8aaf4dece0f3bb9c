"""QueCC: each question reads the image for itself, so a conversation has one question."""

from configs.easy_vqa import base


def get_config():
    return base(
        "quecc",
        dict(name="quecc", scale_factor=2, question_length=24),
        data=dict(turns=1, independent_rounds=False, images_per_row=8),
    )
