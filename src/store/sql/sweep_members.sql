-- Removes members whose lease ended more than a day ago.
delete from shardmq.member where leased_until < shardmq.clock() - interval '1 day'
