"""Networks for text: tokens to a pooled feature and class scores."""

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from models.torchvision_import import import_torchvision


class Output(NamedTuple):
    """What every network for text returns.

    Attributes:
        tokens: (B, L, hidden) the encoder's last layer.
        pooled: (B, hidden) tanh of a linear layer of the first token.
        logits: (B, classes).
    """

    tokens: Tensor
    pooled: Tensor
    logits: Tensor


class Bert(nn.Module):
    """A BERT encoder of transformers, its pooling layer, and a linear classifier.

    Which token is padding, and which belongs to the second text of a pair, follows from the tokens alone: a text, or
    each of two texts, ends with the separator, and padding comes last.

    Attributes:
        encoder: `transformers.BertModel`. features: width of each place that a method may ask for.
    """

    def __init__(
        self,
        classes: int,
        vocabulary: int,
        pad: int,
        separator: int,
        *,
        layers: int,
        hidden: int,
        heads: int,
        intermediate: int | None,
        positions: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.pad, self.separator = pad, separator
        import_torchvision()
        bert = importlib.import_module("transformers.models.bert")
        configuration = bert.BertConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=intermediate or 4 * hidden,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            max_position_embeddings=positions,
            pad_token_id=pad,
        )
        self.encoder: nn.Module = bert.BertModel(configuration, add_pooling_layer=True)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(hidden, classes)
        nn.init.normal_(self.classifier.weight, std=configuration.initializer_range)
        nn.init.zeros_(self.classifier.bias)
        self.features = {"pooled": hidden}

    def forward(self, tokens: Tensor) -> Output:
        """(B, L) int64, each row one or two texts that end with the separator, then padding."""
        separators = (tokens == self.separator).long()
        # The first text's own separator still belongs to it.
        second = ((separators.cumsum(1) - separators) > 0) & (tokens != self.pad)
        present = (tokens != self.pad)[:, None, None, :].expand(-1, 1, tokens.shape[1], -1)
        found = self.encoder(tokens, attention_mask=present, token_type_ids=second.long())
        logits = self.classifier(self.dropout(found.pooler_output))
        return Output(found.last_hidden_state, found.pooler_output, logits)

    @property
    def embeddings(self) -> nn.Embedding:
        """Of the tokens: (vocabulary, hidden)."""
        return cast(nn.Embedding, cast(Any, self.encoder).embeddings.word_embeddings)

    @property
    def layers(self) -> nn.ModuleList:
        """Of the encoder, in their order."""
        return cast(nn.ModuleList, cast(Any, self.encoder).encoder.layer)

    def zero_head(self) -> None:
        """Set the classifier to zero: the same probability for every class."""
        with torch.no_grad():
            self.classifier.weight.zero_()
            self.classifier.bias.zero_()

    @staticmethod
    def own_key(key: str) -> str | None:
        """The name here of a weight of an encoder that transformers saved; None for what no encoder has."""
        key = key.removeprefix("bert.")
        key = key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if key == "embeddings.position_ids" or key.startswith(("cls.", "classifier.")):
            return None
        return f"encoder.{key}"


def build(description: Mapping[str, Any]) -> nn.Module:
    """A network with fresh weights from a model's description (`network` and `interface`)."""
    interface, network = description["interface"], dict(description["network"])
    kinds = {"bert": Bert}
    kind = kinds[network.pop("name")]
    positions = network.pop("positions") or interface["length"]
    sizes = {name: interface[name] for name in ("vocabulary", "pad", "separator")}
    return kind(len(interface["classes"]), **sizes, positions=positions, **network)
