"""The recipe of the embedded demo model: its training stages and its teachers' weights.

`__main__` has the commands: `train` trains the weights in llava_ray/demo/model, `raw` writes raw
data and the parts of a LLaVA for the tiny training recipes.
"""
