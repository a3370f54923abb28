"""The smallest vision-language models: random weights, the libraries' own classes and processors, as `save_pretrained`
leaves them. Each ends its answers: the last token that it may generate is forced to be the end."""

from collections.abc import Callable
from pathlib import Path

import tokenizers
import torch
import transformers as tf

SIDE = 32  # pixels of what the vision towers see
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} answer:{% endif %}"
)
TOWER = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE)
LANGUAGE = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)


def tokenizer(*special: str) -> tf.PreTrainedTokenizerFast:
    """A token a printable character, so that any answer is text."""
    names = ["<s>", "</s>", "<pad>", *special]
    model = tokenizers.Tokenizer(
        tokenizers.models.BPE({name: i for i, name in enumerate([*names, *map(chr, range(32, 127))])}, [])
    )
    model.decoder = tokenizers.decoders.Fuse()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=list(special),
    )


def save(model: tf.PreTrainedModel, processor: tf.ProcessorMixin, folder: Path) -> None:
    # Weights large enough that an answer depends on image and prompt.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.5)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.generation_config.forced_eos_token_id = processor.tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def llava(folder: Path) -> None:
    tokens = tokenizer("<image>")
    torch.manual_seed(0)
    model = tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            vision_config=tf.CLIPVisionConfig(**TOWER, patch_size=8),
            text_config=tf.LlamaConfig(**LANGUAGE, num_key_value_heads=2, vocab_size=len(tokens)),
            image_token_index=tokens.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-1,
        )
    )
    processor = tf.LlavaProcessor(
        image_processor=tf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE),
        tokenizer=tokens,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    save(model, processor, folder)


def idefics3(folder: Path) -> None:
    """An image is as many tokens as its shape needs tiles, so that prompts of a batch differ in length."""
    tokens = tokenizer("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    torch.manual_seed(0)
    processor = tf.Idefics3Processor(
        image_processor=tf.Idefics3ImageProcessor(
            size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}
        ),
        tokenizer=tokens,
        image_seq_len=4,
        chat_template=TEMPLATE,
    )
    model = tf.Idefics3ForConditionalGeneration(
        tf.Idefics3Config(
            vision_config=dict(**TOWER, patch_size=8),
            text_config=tf.LlamaConfig(
                **LANGUAGE, num_key_value_heads=2, vocab_size=len(tokens), pad_token_id=tokens.pad_token_id
            ),
            image_token_id=tokens.convert_tokens_to_ids("<image>"),
            scale_factor=2,
        )
    )
    save(model, processor, folder)


def blip2(folder: Path) -> None:
    tokens = tokenizer("<image>")
    torch.manual_seed(0)
    language = tf.OPTConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    model = tf.Blip2ForConditionalGeneration(
        tf.Blip2Config(
            vision_config=tf.Blip2VisionConfig(**TOWER, patch_size=8),
            qformer_config=tf.Blip2QFormerConfig(
                **LANGUAGE, encoder_hidden_size=16, vocab_size=len(tokens), cross_attention_frequency=1
            ),
            text_config=language,
            num_query_tokens=4,
            image_token_index=tokens.convert_tokens_to_ids("<image>"),
        )
    )
    image_processor = tf.BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    save(model, tf.Blip2Processor(image_processor, tokens, num_query_tokens=4), folder)


FAMILIES: dict[str, Callable[[Path], None]] = {"llava": llava, "idefics3": idefics3, "blip2": blip2}
