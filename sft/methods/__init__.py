"""What a method of training is: the columns a row needs, trainer and arguments, metric. The only package that imports TRL."""
