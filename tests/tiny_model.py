"""A tiny BERT of random weights with the default model's tokenizer: an encoder that trains in seconds."""

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from model.encoder import DEFAULT_MODEL, locate

DIM = 32


def make(folder: Path, pooling: str = "mean_tokens") -> Path:
    """The folder, with the model in it."""
    source, options = locate(DEFAULT_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=48, initializer_range=0.2, **sizes)
        model = BertModel(config)
    model.save_pretrained(folder)
    modules = [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
    return folder
