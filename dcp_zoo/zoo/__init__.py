"""Models and heads by name: the tables (`specs`, `registry`), what a name stands for (`resolve`), how it is made
(`build`), the factories (`factory`), and the entry into timm (`dcp`)."""
