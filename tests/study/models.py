"""A small BERT folder with random weights: the files and names of a real one."""

import json

import torch
from safetensors.torch import save_file
from torch import nn

PIECES = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "on", "mat", "##ing", "##s"),
    *"abcdefghijklmnopqrstuvwxyz0123456789.,!",
    *(f"##{letter}" for letter in "abcdefgt"),
]


class Bert(nn.Module):
    """The same network from torch's own layers, with which ours is compared."""

    def __init__(self, *, width=24, heads=3, layers=2, longest=40):
        super().__init__()
        self.heads, self.width, self.longest = heads, width, longest
        self.words = nn.Embedding(len(PIECES), width)
        self.places = nn.Embedding(longest, width)
        self.kinds = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", 1e-12, batch_first=True)
            for _ in range(layers)
        )
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, ids):
        x = self.norm(self.words(ids) + self.places.weight[: ids.shape[1]] + self.kinds.weight[0])
        for layer in self.layers:
            x = layer(x)
        return x

    def folder(self, path, *, prefix="", **changes):
        """Write the files of a model folder."""
        path.mkdir(parents=True, exist_ok=True)
        out = {
            "embeddings.word_embeddings.weight": self.words.weight,
            "embeddings.position_embeddings.weight": self.places.weight,
            "embeddings.token_type_embeddings.weight": self.kinds.weight,
            "embeddings.LayerNorm.weight": self.norm.weight,
            "embeddings.LayerNorm.bias": self.norm.bias,
        }
        for i, layer in enumerate(self.layers):
            at = f"encoder.layer.{i}"
            weights = layer.self_attn.in_proj_weight.chunk(3)
            biases = layer.self_attn.in_proj_bias.chunk(3)
            for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
                out[f"{at}.attention.self.{name}.weight"] = weight
                out[f"{at}.attention.self.{name}.bias"] = bias
            parts = {
                "attention.output.dense": layer.self_attn.out_proj,
                "attention.output.LayerNorm": layer.norm1,
                "intermediate.dense": layer.linear1,
                "output.dense": layer.linear2,
                "output.LayerNorm": layer.norm2,
            }
            for name, part in parts.items():
                out[f"{at}.{name}.weight"], out[f"{at}.{name}.bias"] = part.weight, part.bias
        save_file({prefix + k: x.detach().clone() for k, x in out.items()}, path / "model.safetensors")
        config = {
            "model_type": "bert",
            "hidden_act": "gelu",
            "hidden_size": self.width,
            "num_attention_heads": self.heads,
            "num_hidden_layers": len(self.layers),
            "max_position_embeddings": self.longest,
            "layer_norm_eps": 1e-12,
        }
        (path / "config.json").write_text(json.dumps(config | changes))
        (path / "vocab.txt").write_text("\n".join(PIECES) + "\n")
        return path


TEXT = "The cat sat on the mat. " * 4


def bert_folder(path, **changes):
    """Write a random BERT."""
    torch.manual_seed(7)
    return Bert().folder(path, **changes)
