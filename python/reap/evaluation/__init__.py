"""How well a model predicts a text, whole, virtually pruned or beside a reference."""
