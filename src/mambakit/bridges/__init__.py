"""Our models in other libraries' classes; each module is imported by those who have its library.

transformers    a language model of ours as a `PreTrainedModel`, for generate, pipeline, Trainer and PEFT
"""
