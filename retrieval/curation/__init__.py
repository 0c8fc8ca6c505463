"""Curation of image-text pairs: rules that drop bad pairs, and a report that shows what each threshold would drop."""
