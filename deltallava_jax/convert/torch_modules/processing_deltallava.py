"""Processor of a Delta-LLaVA model: pixels for the tower, ids for the decoder. Exported by deltallava_jax."""

from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin


class DeltaLlavaProcessor(ProcessorMixin):
    """Texts hold one <image> for each image, in order; the model opens it into as many tokens as it is asked for."""

    attributes = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __call__(self, images=None, text=None, **kwargs):
        tensors = kwargs.pop("return_tensors", None)
        inputs = {}
        if text is not None:
            texts = [text] if isinstance(text, str) else text
            inputs.update(self.tokenizer(texts, return_tensors=tensors, **kwargs))
            inputs.pop("token_type_ids", None)
        if images is not None:
            inputs["pixel_values"] = self.image_processor(images, return_tensors=tensors)["pixel_values"]
        return BatchFeature(inputs, tensor_type=tensors)

    def batch_decode(self, *args, **kwargs):
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args, **kwargs):
        return self.tokenizer.decode(*args, **kwargs)
