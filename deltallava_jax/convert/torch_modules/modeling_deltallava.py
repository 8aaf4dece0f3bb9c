"""A vision-language model with a compressing projector in PyTorch, for transformers. Exported by deltallava_jax.

Needs torch and transformers alone. The projector is in projector.py."""

import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from .configuration_deltallava import DeltaLlavaConfig
from .projector import Projector


class DeltaLlavaForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """input_ids hold one image token for each image of pixel_values; ``budget`` is the visual tokens it opens into."""

    config_class = DeltaLlavaConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True
    _no_split_modules = ["CLIPEncoderLayer", "SiglipEncoderLayer", "LlamaDecoderLayer", "Qwen2DecoderLayer"]

    def __init__(self, config):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = Projector(config.deltallava_projector)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    def get_image_features(self, pixel_values, budget=None):
        """[n, 3, H, W] normalised pixels -> [n, budget, d] visual tokens."""
        select, budget = self.config.select, budget or self.config.budgets[0]
        if budget not in self.config.budgets:
            allowed = ", ".join(map(str, self.config.budgets))
            raise ValueError(f"budget {budget}; the model makes {allowed} tokens an image")
        states = self.vision_tower(pixel_values.to(self.dtype), output_hidden_states=True).hidden_states
        first = 1 if select["drop_cls"] else 0
        levels = torch.cat([states[i][:, first:] for i in select["levels"]], dim=-1) if select["levels"] else None
        return self.multi_modal_projector(states[select["last"]][:, first:], levels, budget)

    def _open(self, input_ids, pixel_values, attention_mask, labels, budget, left):
        """(embeddings, attention mask, labels) of the rows with every image token opened, padded on one side."""
        embeddings = self.get_input_embeddings()(input_ids)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if pixel_values is None:
            return embeddings, attention_mask, labels
        visual = self.get_image_features(pixel_values, budget).to(embeddings.dtype)
        places = (input_ids == self.config.image_token_index) & attention_mask.bool()
        if int(places.sum()) != len(visual):
            raise ValueError(f"{int(places.sum())} image tokens in input_ids, but {len(visual)} images")
        image, rows = 0, []
        for row in range(len(input_ids)):
            live = attention_mask[row].bool()
            x, y = embeddings[row][live], None if labels is None else labels[row][live]
            parts, marks, start = [], [], 0
            for place in places[row][live].nonzero().flatten().tolist():
                parts += [x[start:place], visual[image]]
                if y is not None:
                    marks += [y[start:place], y.new_full((len(visual[image]),), -100)]
                start, image = place + 1, image + 1
            rows.append((torch.cat([*parts, x[start:]]), None if y is None else torch.cat([*marks, y[start:]])))
        length = max(len(x) for x, _ in rows)
        pads = [(length - len(x), 0) if left else (0, length - len(x)) for x, _ in rows]
        embeddings = torch.stack([F.pad(x, (0, 0, *pad)) for (x, _), pad in zip(rows, pads)])
        mask = torch.stack([F.pad(attention_mask.new_ones(len(x)), pad) for (x, _), pad in zip(rows, pads)])
        if labels is not None:
            labels = torch.stack([F.pad(y, pad, value=-100) for (_, y), pad in zip(rows, pads)])
        return embeddings, mask, labels

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        labels=None,
        budget=None,
        inputs_embeds=None,
        **kwargs,
    ):
        """Logits over the opened rows (and the loss with ``labels``), padded on the right."""
        if inputs_embeds is None:
            inputs_embeds, attention_mask, labels = self._open(
                input_ids, pixel_values, attention_mask, labels, budget, left=False
            )
        return self.language_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, labels=labels, **kwargs)

    @torch.no_grad()
    def generate(self, input_ids=None, pixel_values=None, attention_mask=None, budget=None, **kwargs):
        """The new tokens alone; keyword arguments as of transformers' generate."""
        embeddings, mask, _ = self._open(input_ids, pixel_values, attention_mask, None, budget, left=True)
        kwargs.setdefault("generation_config", self.generation_config)
        return self.language_model.generate(inputs_embeds=embeddings, attention_mask=mask, **kwargs)
