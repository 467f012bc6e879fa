"""From the command line and YAML to one plain dict."""
