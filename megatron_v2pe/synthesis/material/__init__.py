"""What samples are made from: passages of text, images, short visual questions."""
