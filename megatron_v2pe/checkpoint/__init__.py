"""Checkpoints of training runs, and Hugging Face folders in and out.

    save, load      a training run's state -> step folder -> any tp, pp, cp, dp
    resume          which step folder a run continues from; `retention`: which are kept
    convert/        Hugging Face folder <-> checkpoint, byte for byte
    adapters/       LoRA weights: base + adapters, PEFT folders in and out
    hf/             weight files, and the names tables: one file for each family
    state/          sharded tensors in the file format of mcore and torch; their private API in one file
    files/          folders, hashes, blocks and byte ranges; no tensor names

Imports go down this list (`files` imports none of the others; `hf` and `state` do not import each other).
"""
