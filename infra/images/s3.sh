#!/usr/bin/env bash
# s3.sh ADDRESS PORT FOLDER: serve S3 from a folder; keys and bucket are in AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and
# S3_BUCKET.
set -euo pipefail
mkdir -p "$3/${S3_BUCKET:-mlflow}"
export RCLONE_AUTH_KEY="\"$AWS_ACCESS_KEY_ID,$AWS_SECRET_ACCESS_KEY\"" RCLONE_CONFIG=/dev/null
exec rclone serve s3 --addr "$1:$2" "$3"
