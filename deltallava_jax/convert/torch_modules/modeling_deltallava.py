"""A vision-language model with a compressing projector in PyTorch, for transformers. Exported by deltallava_jax.

Needs only torch and transformers. The projector is in projector.py."""

import warnings

import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from .configuration_deltallava import DeltaLlavaConfig
from .projector import Projector
from .projector_parts import Features, cls_attention, run_layer


class DeltaLlavaForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """input_ids hold one image token for each image of pixel_values, which is replaced by ``budget`` visual tokens, or
    by fewer if the projector's number of tokens varies.

    question_ids, question_mask: [n, Q], each image's question, from the processor, for projectors that read it."""

    config_class = DeltaLlavaConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True
    supports_gradient_checkpointing = True
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

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def set_output_embeddings(self, value):
        self.language_model.set_output_embeddings(value)

    def resize_token_embeddings(self, *args, **kwargs):
        """Resizes the decoder's embedding and head, and updates both configs."""
        embeddings = self.language_model.resize_token_embeddings(*args, **kwargs)
        self.config.text_config.vocab_size = self.language_model.config.vocab_size
        return embeddings

    def get_image_features(self, pixel_values, budget=None, question_ids=None, question_mask=None):
        """[n, 3, H, W] normalised pixels -> ([n, budget, d] visual tokens, [n, budget] valid mask or None for all)."""
        budget = budget or self.config.budgets[0]
        if budget not in self.config.budgets:
            allowed = ", ".join(map(str, self.config.budgets))
            raise ValueError(f"budget {budget}; the model supports {allowed} tokens per image")
        text = None
        if getattr(self.multi_modal_projector, "reads_question", False):
            if question_ids is None or len(question_ids) != len(pixel_values):
                found = "none" if question_ids is None else len(question_ids)
                raise ValueError(
                    f"the projector reads each image's question: {len(pixel_values)} images, but {found} in "
                    "question_ids; pass images and text to the processor together"
                )
            text = self._question_states(question_ids, question_mask)
        tokens = self.multi_modal_projector(self._features(pixel_values, text), budget)
        return tokens if isinstance(tokens, tuple) else (tokens, None)

    def _features(self, pixel_values, text):
        """The projector's inputs: hidden states of the tower, a layer's keys and the attention of its CLS token."""
        select = self.config.select
        if select["pruned"]:
            return self._pruned(pixel_values)
        states = self.vision_tower(pixel_values.to(self.dtype), output_hidden_states=True).hidden_states
        first = 1 if select["drop_cls"] else 0
        features = Features(states[select["last"]][:, first:], text=text)
        if select["levels"]:
            features.levels = torch.cat([states[i][:, first:] for i in select["levels"]], dim=-1)
        if select["keys"] is not None:
            attention, state = self._attention(select["keys"], states)
            features.keys = attention.k_proj(state)[:, first:]
        if select["cls_attention"] is not None:
            layer, how = select["cls_attention"]
            attention, state = self._attention(layer, states)
            heads = {"head_mean": attention.num_heads, "one_head": 1}[how]
            features.cls_attention = cls_attention(attention, state, heads)
        return features

    def _pruned(self, pixel_values):
        """The tower's features if the projector applies some of its layers."""
        select, tower = self.config.select, self.vision_tower
        x = tower.pre_layrnorm(tower.embeddings(pixel_values.to(self.dtype)))
        for index, layer in enumerate(tower.encoder.layers[: select["last"]]):
            if index in select["pruned"]:
                x = self.multi_modal_projector.prune(select["pruned"].index(index), layer, x)
            else:
                x = run_layer(layer, x)
        return Features(x[:, 1:])

    def _attention(self, layer, states):
        """The self-attention of a layer of the tower, and its input."""
        module = self.vision_tower.encoder.layers[layer - 1]
        return module.self_attn, module.layer_norm1(states[layer - 1])

    @torch.no_grad()
    def _question_states(self, ids, mask):
        """[n, d]: the last hidden state of each question, read by the decoder on its own; zeros for an empty one.

        Of a question longer than ``question_length`` the beginning is read, which is warned of."""
        longest = self.config.deltallava_projector["question_length"]
        mask = torch.ones_like(ids) if mask is None else mask
        rows = [row[live.bool()] for row, live in zip(ids, mask, strict=True)]
        if any(len(row) > longest for row in rows):
            cut = f"a question is longer than the {longest} tokens that are read of it; the rest is cut off"
            warnings.warn(cut, stacklevel=2)
        rows = [row[:longest] for row in rows]
        lengths = torch.tensor([len(row) for row in rows], device=ids.device)
        # Attention is causal, so the padding on the right needs no mask.
        padded = torch.stack([F.pad(row, (0, longest - len(row))) for row in rows])
        hidden = self.language_model.model(padded, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(rows), device=ids.device), (lengths - 1).clamp(min=0)]
        return torch.where(lengths[:, None] > 0, last, 0)

    def _open(self, input_ids, pixel_values, attention_mask, labels, left, **kwargs):
        """(embeddings, attention mask, labels) of the rows with image tokens replaced by visual tokens, padded.

        kwargs: of get_image_features."""
        embeddings = self.get_input_embeddings()(input_ids)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if pixel_values is None:
            return embeddings, attention_mask, labels
        visual, valid = self.get_image_features(pixel_values, **kwargs)
        visual = visual.to(embeddings.dtype)
        if valid is not None:
            visual = [tokens[live] for tokens, live in zip(visual, valid, strict=True)]
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
        embeddings = torch.stack([F.pad(x, (0, 0, *pad)) for (x, _), pad in zip(rows, pads, strict=True)])
        mask = torch.stack(
            [F.pad(attention_mask.new_ones(len(x)), pad) for (x, _), pad in zip(rows, pads, strict=True)]
        )
        if labels is not None:
            labels = torch.stack([F.pad(y, pad, value=-100) for (_, y), pad in zip(rows, pads, strict=True)])
        return embeddings, mask, labels

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        labels=None,
        budget=None,
        question_ids=None,
        question_mask=None,
        inputs_embeds=None,
        **kwargs,
    ):
        """Logits (and the loss, given ``labels``) of the rows with their visual tokens, padded on the right."""
        if inputs_embeds is None:
            inputs_embeds, attention_mask, labels = self._open(
                input_ids, pixel_values, attention_mask, labels, left=False,
                budget=budget, question_ids=question_ids, question_mask=question_mask,
            )  # fmt: skip
        return self.language_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, labels=labels, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        inputs=None,
        pixel_values=None,
        attention_mask=None,
        budget=None,
        question_ids=None,
        question_mask=None,
        input_ids=None,
        inputs_embeds=None,
        **kwargs,
    ):
        """Only the new tokens. inputs: an alias of input_ids. Keyword arguments as in transformers' generate."""
        if inputs_embeds is None:
            inputs_embeds, attention_mask, _ = self._open(
                inputs if input_ids is None else input_ids, pixel_values, attention_mask, None, left=True,
                budget=budget, question_ids=question_ids, question_mask=question_mask,
            )  # fmt: skip
        kwargs.setdefault("generation_config", self.generation_config)
        return self.language_model.generate(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)
