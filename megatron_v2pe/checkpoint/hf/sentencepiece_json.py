"""tokenizer.json of a sentencepiece vocabulary (InternLM2, InternLM3), for folders whose tokenizer class ships no code.

pieces and scores --pairs that make a piece, best piece first--> merges --> byte pairs, with bytes as fallback
"""

from __future__ import annotations

import json
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.core.excerpt import shortened
from megatron_v2pe.data.text.tokenizer_files import read_tokenizer_files
from megatron_v2pe.data.text.vocabularies import WORD_MARK, read_sentencepiece


def tokenizer_json(folder: Path) -> bytes:
    """Contents of tokenizer.json for a folder with tokenizer.model.

    Raises:
        CheckpointError: a file is missing or damaged, or the model is none of byte pairs.
    """
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(read_sentencepiece(folder / "tokenizer.model"))
    files = read_tokenizer_files(folder)
    # Added tokens may take the place of unused pieces.
    renamed = {index: token for token, index in files.added.items()}
    pieces = {renamed.get(i, processor.IdToPiece(i)): i for i in range(processor.GetPieceSize())}
    unknown = processor.IdToPiece(processor.unk_id())
    try:
        model = models.BPE(
            vocab=pieces,
            merges=_merges(processor, pieces),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    except Exception as error:  # the library raises plain exceptions
        raise CheckpointError(f"{folder / 'tokenizer.model'}: no byte pair model ({error})") from None
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=WORD_MARK, prepend_scheme="never", split=False
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace(WORD_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    added = dict(files.added) | {token: pieces[token] for token in files.special if token in pieces}
    for token, _ in sorted(added.items(), key=lambda item: item[1]):
        is_special = token in files.special
        backend.add_tokens([AddedToken(token, normalized=False, special=is_special)])
    if files.config.get("add_bos_token") is not False and "bos_token" in files.roles:
        bos = files.roles["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, added[bos])]
        )
    wrong = [token for token, index in added.items() if backend.token_to_id(token) != index]
    if wrong:
        raise CheckpointError(
            f"{folder}: added token {shortened(wrong[0])} would get another id in tokenizer.json"
        )
    return (json.dumps(json.loads(backend.to_str()), ensure_ascii=False, indent=2) + "\n").encode()


def _merges(processor: sentencepiece.SentencePieceProcessor, pieces: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, in the order in which sentencepiece would join them."""
    found: list[tuple[float, int, int, str, str]] = []
    for piece, index in pieces.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                found.append((-processor.GetScore(index), pieces[left], pieces[right], left, right))
    return [(left, right) for _, _, _, left, right in sorted(found)]
