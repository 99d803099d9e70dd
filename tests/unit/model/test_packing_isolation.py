"""Documents of a pack do not know of each other: one is exchanged, and nothing of the others changes by a single bit.

Packs come from the packers that train, with documents cut by `seq_len` and by the pack's end. The loss is the mean over
all targets, so the number of targets, which a document's length decides, stays as it is.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from internlm_ds.arch import blueprint
from internlm_ds.config.schema import DataConfig, ModelConfig
from internlm_ds.data.collate import micro_batch_arrays, row_arrays
from internlm_ds.data.packing import Concatenation, FixedSegmentPacker, PaddedBatcher, SegmentPacker
from internlm_ds.data.samples import ListedSamples
from internlm_ds.data.trace import Trace
from internlm_ds.data.trainset import TrainSet, open_sampler
from internlm_ds.model.layers import LanguageModel, build_layers
from internlm_ds.model.loss import cross_entropy
from internlm_ds.parallel.context import Axis

SEQ_LEN, ROWS, VOCAB_SIZE = 16, 4, 97
LENGTHS = [5, 16, 3, 40, 9, 1, 12, 30, 7, 11, 2, 20]
V1 = ModelConfig(
    num_layers=2, hidden_size=32, vocab_size=VOCAB_SIZE, num_attention_heads=4, mlp_ratio=2, embed_split_hidden=True
)
FAMILIES = {
    "INTERNLM": V1,
    "INTERNLM2_PUBLIC": replace(V1, num_kv_attention_heads=2),
    "LLAMA2": replace(V1, num_kv_attention_heads=2),
}


def language_model(family, attention):
    arch = blueprint(family, FAMILIES[family])
    axis = Axis.single("tensor")
    entries = build_layers(arch, FAMILIES[family], tensor=axis, seed=1, dtype=torch.float32, attention=attention)
    model = LanguageModel(entries).eval()
    with torch.no_grad():
        for _, parameter in model.named_logical_parameters():
            parameter.mul_(8) if parameter.dim() == 2 else parameter.add_(0.1)
    return model


def documents(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, VOCAB_SIZE, size=length) for length in LENGTHS]


def packed(packer, samples, index):
    """Micro-batch `index` of a packer as tensors: tokens, borders, labels; and the documents in it."""
    packs = Concatenation([packer(ListedSamples(samples), packed_length=SEQ_LEN * ROWS, seq_len=SEQ_LEN)])
    rows = ROWS if packer is PaddedBatcher else None
    arrays = micro_batch_arrays(packs[index]) if rows is None else row_arrays(packs[index], rows=rows, seq_len=SEQ_LEN)
    sampler = open_sampler(DataConfig(micro_num=1), packs, (), data_rank=0, data_size=1)
    pieces = Trace(TrainSet(packs, (), ("en",), rows, SEQ_LEN), sampler).pack(index).pieces
    tensors = [torch.from_numpy(each) for each in (arrays.tokens, arrays.cu_seqlens, arrays.labels)]
    return tensors, pieces


def exchanged(samples, piece):
    """The samples with another document, of the same length, in the place of one."""
    changed, order = list(samples), np.arange(len(samples))
    np.random.RandomState(1024).shuffle(order)
    place = int(order[piece.sample])
    changed[place] = changed[place] % (VOCAB_SIZE - 1) + 1
    return changed


def positions(pieces, total):
    """Where these documents stand in the micro-batch; padding behind a row belongs to none."""
    found = torch.zeros(total, dtype=torch.bool)
    for piece in pieces:
        found[piece.place : piece.place + piece.stop - piece.start] = True
    return found


def bits(tensor):
    return tensor.detach().view(torch.int32)


def trained(model, tokens, borders, labels):
    """Logits, the gradient of each token's embedding, and of all parameters."""
    embedded = []
    handle = model.layers[0].register_forward_hook(lambda _, __, out: embedded.append(_kept(out)))
    logits = model(tokens, borders)
    handle.remove()
    model.zero_grad()
    cross_entropy(logits, labels, label_smoothing=0.0).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_logical_parameters()}
    return logits, embedded[0].grad, gradients


def _kept(out):
    hidden = out[0] if isinstance(out, tuple) else out
    hidden.retain_grad()
    return hidden


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packer", [SegmentPacker, PaddedBatcher])
def test_an_exchanged_document_changes_nothing_of_the_others(packer, family, attention):
    model, samples = language_model(family, attention), documents()
    for index in (0, 1):
        (tokens, borders, labels), pieces = packed(packer, samples, index)
        assert len(pieces) > 2
        logits, hidden, _ = trained(model, tokens, borders, labels)
        for piece in pieces:
            inside = positions([piece], len(tokens))
            others = positions([each for each in pieces if each != piece], len(tokens))
            (other_tokens, other_borders, other_labels), _ = packed(packer, exchanged(samples, piece), index)
            assert torch.equal(other_borders, borders)
            assert torch.equal(other_tokens[~inside], tokens[~inside]) and (other_tokens != tokens)[inside].all()

            other_logits, other_hidden, _ = trained(model, other_tokens, borders, other_labels)
            assert torch.equal(bits(other_logits)[others], bits(logits)[others])
            assert torch.equal(bits(other_hidden)[others], bits(hidden)[others])
            assert not torch.equal(other_logits[inside], logits[inside])

            # what the others alone teach the model: the exchanged document is read, not learned
            masked = labels.masked_fill(inside, -100)
            if (masked >= 0).any():
                ours = trained(model, tokens, borders, masked)[2]
                theirs = trained(model, other_tokens, borders, other_labels.masked_fill(inside, -100))[2]
                assert all(torch.equal(bits(ours[name]), bits(theirs[name])) for name in ours)
                assert any(gradient.any() for gradient in ours.values())


def test_rows_across_documents_are_what_is_not_isolated():
    """`pack_sample_into_one` shows attention the documents of a row, and of no other row: the test above can fail."""
    model, samples = language_model("INTERNLM", "sdpa"), documents()
    (tokens, borders, _), pieces = packed(FixedSegmentPacker, samples, 0)
    logits = model(tokens, borders)
    piece = pieces[0]
    (other, _, _), _ = packed(FixedSegmentPacker, exchanged(samples, piece), 0)
    rows = torch.arange(len(tokens)) // SEQ_LEN
    touched = rows <= (piece.stop - piece.start - 1) // SEQ_LEN
    behind = touched & (torch.arange(len(tokens)) >= piece.stop - piece.start)
    changed = model(other, borders)
    assert torch.equal(bits(changed)[~touched], bits(logits)[~touched])
    assert behind.any() and (changed != logits).any(dim=1)[behind].all()
