"""What the import hook changes in MAX: the model name `step3p5`, and our errors where MAX looks before it asks us."""
