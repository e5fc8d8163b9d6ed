-- Run once, in an empty database: POSTGRES_DB has made `mlflow`.
CREATE DATABASE prefect;
