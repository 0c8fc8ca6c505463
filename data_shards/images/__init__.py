"""Image files to pixels: decoding, resizing and augmentation."""
