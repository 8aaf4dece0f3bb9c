"""TokenPacker."""

from configs.easy_vqa import base


def get_config():
    return base("token_packer", dict(name="token_packer", scale_factor=2))
