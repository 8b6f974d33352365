"""`clae monitor`: are the embeddings of new images still distributed as those of a reference?"""
