"""PriorCLIP pretraining: the one name under which all packages of this repository are imported.

    from priorclip.model import from_pretrained

In a checkout, the entries of this folder are links to the folders beside it. In an installed wheel they are folders.
"""
