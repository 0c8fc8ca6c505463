"""After stage one: the scene prior, vision-instruction tuning (stage two), closed-domain PriorITR."""
