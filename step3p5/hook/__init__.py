"""What `python -m step3p5.enable` changes in MAX: the model name `step3p5`, and our errors for a bad `config.json`."""
