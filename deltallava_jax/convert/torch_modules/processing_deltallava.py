"""Processor of a Delta-LLaVA model: pixels for the tower, ids for the decoder. Exported by deltallava_jax."""

import re

from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

IMAGE = "<image>"


class DeltaLlavaProcessor(ProcessorMixin):
    """Texts hold one <image> for each image, in order, which the model replaces by its visual tokens.

    question_end: for models that read each image's question, the text between a question and its answer ("": a question
    extends to the end of its text); None for other models."""

    attributes = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, question_end=None, **kwargs):
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        self.question_end = question_end

    def __call__(self, images=None, text=None, **kwargs):
        """input_ids, attention_mask and pixel_values; for models that read the question also question_ids and
        question_mask, [images, Q]."""
        tensors = kwargs.pop("return_tensors", None)
        inputs = {}
        if text is not None:
            texts = [text] if isinstance(text, str) else text
            if kwargs.get("add_special_tokens", True) and self.tokenizer.bos_token:
                texts = [each.removeprefix(self.tokenizer.bos_token) for each in texts]  # the tokenizer adds it
            inputs.update(self.tokenizer(texts, return_tensors=tensors, **kwargs))
            inputs.pop("token_type_ids", None)
            if self.question_end is not None:
                inputs.update(self._questions(texts))
        if images is not None:
            inputs["pixel_values"] = self.image_processor(images, return_tensors=tensors)["pixel_values"]
        return BatchFeature(inputs, tensor_type=tensors)

    def _questions(self, texts):
        """Ids and mask of every image's question, padded on the right."""
        questions = [question for text in texts for question in self._asked(text)]
        found = [list(self.tokenizer(question)["input_ids"]) if question else [] for question in questions]
        if not found:
            return {}
        length = max(1, *map(len, found))
        return {
            "question_ids": [ids + [0] * (length - len(ids)) for ids in found],
            "question_mask": [[1] * len(ids) + [0] * (length - len(ids)) for ids in found],
        }

    def _asked(self, text):
        """Each image's question: the text after the images of its turn."""
        questions = []
        for image in re.finditer(IMAGE, text):
            stop = text.find(self.question_end, image.end()) if self.question_end else len(text)
            stop = len(text) if stop < 0 else stop
            start = text.rfind(IMAGE, 0, stop) + len(IMAGE)
            questions.append(text[start:stop].strip())
        return questions

    def batch_decode(self, *args, **kwargs):
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args, **kwargs):
        return self.tokenizer.decode(*args, **kwargs)
