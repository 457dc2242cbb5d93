"""Other people's ways to compute the same, as providers: by hand-written autograd, PEFT, Liger."""
