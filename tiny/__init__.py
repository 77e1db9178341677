"""ernie-image-tiny: the released architecture in miniature, trained from scratch on drawn, captioned scenes."""
