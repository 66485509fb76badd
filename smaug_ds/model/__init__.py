"""The SMAUG model (arXiv 2211.11446), part by part."""
