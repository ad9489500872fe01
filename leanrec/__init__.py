"""leanrec makes recommenders many times smaller without losing quality."""
