-- A new version of the topology, told to all that listen. Changes are rare: this is no append.
with bumped as (
    update shardmq_control.cluster
       set version = version + 1, token = gen_random_uuid(), history = (token || history)[1:32]
    returning version)
select pg_notify('shardmq_topology', version::text) from bumped
