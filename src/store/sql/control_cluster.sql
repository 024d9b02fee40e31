-- The cluster's id and the version of its topology: its number, its token and the tokens before.
select id, version, token, history from shardmq_control.cluster
