#!/bin/sh
# Secrets that are mounted as files become settings: /run/secrets/NIBBLE_REDIS_URL, /run/secrets/AWS_SECRET_ACCESS_KEY.
# What is in the environment already is left as it is.
set -eu
for file in "${NIBBLE_SECRETS_DIR:-/run/secrets}"/*; do
    name=${file##*/}
    case "$name" in
        NIBBLE_* | AWS_* | HF_TOKEN)
            if [ -r "$file" ] && ! printenv "$name" > /dev/null; then
                value=$(cat "$file")
                export "$name=$value"
            fi
            ;;
    esac
done
exec nibble "$@"
