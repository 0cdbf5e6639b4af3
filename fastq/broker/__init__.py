"""All Redis traffic: key names, scripts, commands, the two movers, the inspector and the embedded server."""
