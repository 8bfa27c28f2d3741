"""What `python -m step3p5.enable` turns on: the model name `step3p5`, and our errors for a bad `config.json`."""
