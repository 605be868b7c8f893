"""What Wan reads of a prompt and of an image: the UMT5-XXL encoder, and CLIP's vision tower."""
