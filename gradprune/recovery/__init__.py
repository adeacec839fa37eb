"""SMALLER MODEL -> BETTER SMALLER MODEL. Training a pruned model on text, or to predict like its dense teacher."""
