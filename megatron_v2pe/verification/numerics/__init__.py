"""One input through a second implementation and through ours, compared stage by stage.

inputs.py            a small pack of text and tiles, made from a seed
reference_model.py   plain PyTorch from Hugging Face names, layer by layer; reference_rope.py is a part of it
captured.py          our model at any layout, with what each stage gave
compare.py           the table, and the tolerances
"""
