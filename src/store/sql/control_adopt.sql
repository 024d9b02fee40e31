-- Makes a copy of a control database that of another cluster: without what leads to servers of the first.
-- $1 cluster  $2 server and database
with members as (delete from shardmq_control.member),
outboxes as (delete from shardmq_control.outbox),
settings as (delete from shardmq_control.setting where name like 'listen\_url\_%' or name = 'adopting')
update shardmq_control.cluster set id = $1, server = $2
