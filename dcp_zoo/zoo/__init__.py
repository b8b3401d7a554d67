"""Models and heads by name: tables (`registry`), what a name stands for (`resolve`), how it is made
(`build`), the factories (`factory`), and the entry into timm (`dcp`)."""
